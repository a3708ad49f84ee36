"""Draw samples: where their tokens stand, who sees whom, and which RoPE pairs turn with the branch; as PNG and SVG.

    python scripts/visualize.py
    python scripts/visualize.py --background "The tower is red." --branches "What is red?" "Why?" --visibility prompts
    python scripts/visualize.py --model-name ./parallel-decoder-squad --input samples.jsonl

Without a sample the worked example is drawn: a background of 8 tokens, prompts of 4, 3 and 2.
"""  # fmt: skip

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pd_jax.cli import flag, parse, run
from pd_jax.config import Align, Visibility
from pd_jax.errors import InputError

if TYPE_CHECKING:
    from pd_jax.layout import Sample, TokenSample

BASE = Path(__file__).parent / "quickstart-base"
LIKE = "Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class Flags:
    model_name: str | None = flag(
        None, f"whose tokens and RoPE; without it those of the quickstart's base and of {LIKE}", group="model"
    )
    visibility: Visibility | None = flag(
        None, "which siblings a branch sees; as in training if not given", group="model"
    )
    align: Align | None = flag(None, "how prompts share columns; as in training if not given", group="model")
    pair_indices: tuple[int, ...] | None = flag(None, "RoPE pairs if none are stored", group="model")
    background: str | None = flag(None, "the text that all branches share", group="samples")
    branches: tuple[str, ...] = flag((), "prompts, one argument each", group="samples")
    input: str | None = flag(None, "a file of samples, as scripts/answer.py takes it", group="samples")
    documents: int = flag(4, "samples of --input, from the first", group="samples", minimum=1)
    output_dir: str = flag("./pictures", "where the pictures go", group="output")


def samples(flags: Flags) -> "list[Sample]":
    """What is to be drawn; nothing: the worked example."""
    from pd_jax.data.text import BadRows
    from pd_jax.jobs import read_requests
    from pd_jax.layout import Sample

    if flags.input is not None and (flags.background is not None or flags.branches):
        raise InputError("--input and --background or --branches contradict each other; leave one out")
    if flags.input is not None:
        return [request.sample for request in islice(read_requests(Path(flags.input), BadRows()), flags.documents)]
    if flags.background is not None and not flags.branches:
        raise InputError("--background needs --branches: prompts that unfold behind it")
    return [Sample(flags.background or "", flags.branches)] if flags.branches else []


def worked_example() -> "tuple[TokenSample, list[list[str]]]":
    """A background of 8 tokens and prompts of 4, 3 and 2; and what its tokens are called, by branch."""
    from pd_jax.layout import Branch, TokenSample

    lengths = (4, 3, 2)
    names = [[f"B{i}" for i in range(8)], *([f"Q{b}[{i}]" for i in range(n)] for b, n in enumerate(lengths, start=1))]
    return TokenSample(range(8), [Branch(range(n)) for n in lengths]), names


def main() -> None:
    flags = parse(Flags, description=__doc__)
    import numpy as np

    from pd_jax.data.text import pieces, tokenise_samples
    from pd_jax.evaluation import draw_layout, draw_mask, draw_rope
    from pd_jax.files import find_source, known_config, load_config, load_tokenizer
    from pd_jax.layout import build_layout

    asked, out = samples(flags), Path(flags.output_dir)
    if flags.model_name is None:
        config, tokenizer = known_config(LIKE), load_tokenizer(BASE)
        if flags.pair_indices is not None:
            config = replace(config, pair_indices=flags.pair_indices)
    else:
        model, adapter = find_source(flags.model_name, None, False)
        config = load_config(model, flags.pair_indices, adapter)
        tokenizer = load_tokenizer(model, config.vocab_size)
    visibility, align = flags.visibility or config.decoded_as[0], flags.align or config.decoded_as[1]

    def drawn() -> "Iterator[tuple[TokenSample, list[list[str]]]]":
        """Samples and the texts of their tokens, by branch."""
        if not asked:
            yield worked_example()
        for sample in tokenise_samples(asked, tokenizer, config.vocab_size) if asked else ():
            yield sample, [pieces(tokenizer, ids) for ids in (sample.background, *(b.prompt for b in sample.branches))]

    for number, (sample, texts) in enumerate(drawn(), start=1):
        layout = build_layout([[sample]], align=align)
        words = np.empty(len(sample), object)
        for branch, text in enumerate(texts):
            words[layout.branch[0] == branch] = text
        end = f"-{number}" if len(asked) > 1 else ""
        for kind in ("png", "svg"):
            draw_layout(layout, words.tolist(), out / f"layout{end}.{kind}")
            draw_mask(layout, out / f"mask{end}.{kind}", sample.visibility or visibility, words=words.tolist())
            draw_rope(config, layout, out / f"rope{end}.{kind}")
        names = ", ".join(f"{name}{end}.{{png,svg}}" for name in ("layout", "mask", "rope"))
        print(f"{out}: {names} ({len(sample)} tokens, visibility {sample.visibility or visibility}, align {align})")


if __name__ == "__main__":
    run(main)
