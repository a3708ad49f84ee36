"""Questions about a sibling's passage, made from any data set in SQuAD's format.

    python scripts/make_passages.py --dataset-name train.json.gz --output-dir ./passages

siblings.json is what finetune.py and evaluate.py read; background.json has the same questions with the passage that
they are about in the background: how well the model answers what it need not look for (--min-questions 1).
"""  # fmt: skip

import json
from dataclasses import dataclass
from pathlib import Path

from pd_jax.cli import flag, parse, run
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Flags:
    dataset_name: str = flag("rajpurkar/squad", "hub id or file in SQuAD's format", group="data")
    dataset_split: str = flag("train", "split of a hub data set", group="data")
    local_files_only: bool = flag(False, "never ask the hub", group="data")
    output_dir: str = flag("./passages", "where siblings.json and background.json go", group="output")
    branches: int = flag(4, "passages and questions of a set", group="sets", minimum=2)
    sets: int = flag(300, "at most so many", group="sets", minimum=1)
    words: tuple[int, ...] = flag((30, 85), "of a passage, least and most", group="sets", minimum=1)
    seed: int = flag(0, "of what is drawn", group="sets", minimum=0)


def main(flags: Flags) -> None:
    from pd_jax.data.passages import PassageSettings, as_squad, passage_sets
    from pd_jax.data.squad import load_squad
    from pd_jax.machines import write_whole

    if len(flags.words) != 2:
        raise InputError(f"--words {' '.join(map(str, flags.words))}: give two numbers, the least and the most")
    contexts = load_squad(flags.dataset_name, flags.dataset_split, flags.local_files_only)
    least, most = flags.words
    settings = PassageSettings(flags.branches, flags.sets, (least, most), flags.seed)
    output = Path(flags.output_dir)
    for name, made in zip(("siblings", "background"), passage_sets(contexts, settings), strict=True):
        path = output / f"{name}.json"
        write_whole(path, json.dumps(as_squad(made), ensure_ascii=False, indent=1) + "\n")
        print(f"{path}: {len(made)} contexts, {sum(len(context.questions) for context in made)} questions")


if __name__ == "__main__":
    run(lambda: main(parse(Flags, description=__doc__)))
