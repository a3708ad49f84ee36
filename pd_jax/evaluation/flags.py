"""The flags of scripts/evaluate.py; only `evaluate` reads them."""

from dataclasses import dataclass

from pd_jax.cli import flag
from pd_jax.config import Align, Dtype
from pd_jax.evaluation.results import Metric

MODEL, DATA, RUN = "model", "data", "running and saving"


@dataclass(frozen=True)
class EvaluateFlags:
    """scripts/evaluate.py"""

    base_model: str | None = flag(None, "Hugging Face model of the hf rows: directory or hub id", group=MODEL)
    ft_model: str | None = flag(None, "model of our rows, or a LoRA adapter", group=MODEL)
    ft_base_model: str | None = flag(None, "what a LoRA adapter belongs to, if not what it names itself", group=MODEL)
    sequential_model: str | None = flag(
        None, "model of the row sequential, say a control finetuned without columns; --ft-model if none", group=MODEL
    )
    rows: tuple[str, ...] = flag(
        (),
        "hf-sequential hf-batched hf-one-prompt sequential isolated prompts columns; empty: all that the models allow; "
        "ROW=MODEL runs a row with another model, say isolated=./control",
        group=RUN,
    )
    against: str | None = flag(None, "row that differences are taken against; the first row if not given", group=RUN)
    pair_indices: tuple[int, ...] | None = flag(None, "RoPE pairs of our rows if none are stored", group=MODEL)
    align: Align | None = flag(
        None, "alignment of the rows prompts and columns; as each model was trained, else left", group=MODEL
    )
    dtype: Dtype = flag("float32", "weights and activations of every row", group=MODEL)
    local_files_only: bool = flag(False, "never ask the hub", group=MODEL)
    dataset_name: str = flag("rajpurkar/squad", "hub id or file in SQuAD's format", group=DATA)
    dataset_split: str = flag("validation", "split of a hub data set", group=DATA)
    max_branches: int = flag(3, "at most this many questions a context, beside the background", group=DATA, minimum=1)
    min_questions: int = flag(2, "contexts with fewer questions are left out", group=DATA, minimum=1)
    max_eval_samples: int = flag(64, "at most this many contexts, drawn by the seed", group=DATA, minimum=1)
    first_samples: bool = flag(False, "take the first contexts of the data instead of drawing them", group=DATA)
    skip_bad_rows: bool = flag(False, "leave out questions without usable text, and count them", group=DATA)
    metric: Metric = flag("squad", "squad: words, English; cmrc: characters, Chinese", group=DATA)
    max_new_tokens: int = flag(32, "tokens an answer, at most", group=RUN, minimum=1)
    batch_size: int = flag(
        1, "contexts answered at once (one question at a time where rows are serial)", group=RUN, minimum=1
    )
    repeats: int = flag(1, "timed runs of each batch, the median counts; 0: answers only", group=RUN, minimum=0)
    seed: int = flag(0, "of the contexts that are drawn and of the bootstrap", group=RUN, minimum=0)
    output_dir: str = flag("./evaluation", "results.json, report.html, predictions-ROW.jsonl", group=RUN)
    dump_file: str | None = flag(None, "JSON file with every question, its gold answers and the predictions", group=RUN)
    from_: str | None = flag(None, "a results.json to render again, without running anything", group=RUN)
