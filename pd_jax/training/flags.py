"""The flags of pretraining and finetuning. Defaults of the reference experiment keep their names and values."""

from dataclasses import dataclass
from typing import Literal

from pd_jax.cli import flag
from pd_jax.config import LORA_TARGETS, Align, Backend, Remat, RowVisibility

MODEL, DATA, OPTIM, LORA, RUN = "model", "data", "optimisation", "LoRA", "running and saving"


@dataclass(frozen=True)
class TrainFlags:
    """What pretraining and finetuning share; each has its own default for the first two."""

    output_dir: str = flag("./trained", "where the model and the run's state go", group=RUN)
    model_name: str = flag("Qwen/Qwen3-4B", "model directory, pd_jax checkpoint or hub id to start from", group=MODEL)
    random_init: bool = flag(False, "start from random weights; config.json and tokenizer are enough", group=MODEL)
    pair_indices: tuple[int, ...] | None = flag(
        None,
        "1-based RoPE pairs; the 1st, 3rd, ... turn with the branch; if none is stored 8 16 24 for heads of 128, and "
        "the same frequencies for others",
        group=MODEL,
    )
    sibling_bias: bool | None = flag(
        None, "a learned bias per layer and head towards sibling branches; if not given, added to pretrained weights "
        "that never saw columns", group=MODEL,
    )  # fmt: skip
    sibling_bias_start: float | None = flag(
        None, "where a new sibling_bias begins: 0 lets siblings be seen, -8 hides them; 0 with --random-init, else -2",
        group=MODEL,
    )  # fmt: skip
    visibility: RowVisibility | None = flag(
        None, "which siblings a branch sees; mix: drawn for every sample; as trained before, else columns", group=MODEL
    )
    mix_shares: tuple[float, ...] = flag(
        (1.0, 1.0, 1.0), "of --visibility mix: the shares of columns, isolated and prompts", group=MODEL, minimum=0
    )
    align: Align | None = flag(
        None, "how prompts share columns; as the model was trained before, else left", group=MODEL
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "compute dtype; auto is float32 on CPU and bfloat16 elsewhere; trained weights stay float32",
        group=MODEL,
    )
    attention: Backend = flag("auto", "attention backend", group=MODEL)
    local_files_only: bool = flag(False, "never ask the hub", group=MODEL)

    skip_bad_rows: bool = flag(
        False, "leave out rows of the data without usable text, and count them; else they end the run", group=DATA
    )

    batch_size: int = flag(1, "rows of a micro-batch, over all devices", group=OPTIM, minimum=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches an optimiser step", group=OPTIM, minimum=1)
    learning_rate: float = flag(4e-4, "peak learning rate of AdamW", group=OPTIM, minimum=0)
    sibling_bias_lr: float | None = flag(
        None,
        "peak learning rate of sibling_bias; if not given it can move by about 3 in the run",
        group=OPTIM,
        minimum=0,
    )
    warmup_ratio: float = flag(0.03, "share of the steps for linear warm-up before the cosine", group=OPTIM, minimum=0)
    weight_decay: float = flag(0.01, "decoupled weight decay; norms and biases have none", group=OPTIM, minimum=0)
    max_grad_norm: float = flag(1.0, "global gradient norm is clipped to this", group=OPTIM, minimum=0)
    remat: Remat = flag(
        "none", "what the backward pass recomputes: nothing, all but matrix products, or every layer", group=OPTIM
    )

    use_lora: bool = flag(False, "train low-rank adapters only", group=LORA)
    adapter: str | None = flag(None, "directory of adapters to continue from", group=LORA)
    lora_r: int = flag(16, "rank", group=LORA, minimum=1)
    lora_alpha: float = flag(32.0, "the adapters are scaled by alpha / rank", group=LORA)
    lora_dropout: float = flag(0.05, "dropout on the adapters' input", group=LORA, minimum=0)
    lora_target_modules: tuple[str, ...] = flag(LORA_TARGETS, "projections that get adapters", group=LORA)

    mesh: tuple[int, ...] = flag((1, -1, 1), "devices along data, fsdp and tensor; -1 takes the rest", group=RUN)
    seed: int = flag(0, "of initialisation, shuffling and dropout", group=RUN, minimum=0)
    logging_steps: int = flag(10, "optimiser steps between log lines", group=RUN, minimum=1)
    save_steps: int = flag(500, "optimiser steps between checkpoints", group=RUN, minimum=1)
    eval_steps: int = flag(500, "optimiser steps between validation losses", group=RUN, minimum=1)
    keep: int = flag(2, "newest checkpoints kept, beside the best", group=RUN, minimum=1)
    workers: int = flag(0, "processes that prepare batches; 0 uses threads", group=RUN, minimum=0)
    profile: str | None = flag(None, "FIRST:LAST steps to write a profiler trace of", group=RUN)
    coordinator_address: str | None = flag(None, "HOST:PORT of process 0, for several processes", group=RUN)
    num_processes: int | None = flag(None, "how many processes there are", group=RUN, minimum=1)
    process_id: int | None = flag(None, "which one this is, from 0", group=RUN, minimum=0)


@dataclass(frozen=True)
class PretrainFlags(TrainFlags):
    """scripts/pretrain.py"""

    output_dir: str = flag("./pretrained-columnar", "where the model and the run's state go", group=RUN)
    dataset_name: str = flag(
        "HuggingFaceFW/fineweb-edu", "hub id, directory or file (.jsonl, .jsonl.gz, .json, .parquet)", group=DATA
    )
    dataset_config: str = flag("sample-10BT", "subset of a hub data set", group=DATA)
    dataset_split: str = flag("train", "split of a hub data set", group=DATA)
    streaming: bool = flag(False, "read the data set as it comes instead of downloading it first", group=DATA)
    max_samples: int | None = flag(None, "use at most this many documents", group=DATA, minimum=1)
    eval_dataset_name: str | None = flag(None, "documents for the validation loss", group=DATA)
    branch_count: int = flag(16, "branches a row", group=DATA, minimum=1)
    seq_length: int = flag(256, "tokens a branch", group=DATA, minimum=2)
    max_steps: int = flag(20480, "optimiser steps", group=OPTIM, minimum=1)


@dataclass(frozen=True)
class FinetuneFlags(TrainFlags):
    """scripts/finetune.py"""

    model_name: str = flag(
        "./pretrained-columnar", "model directory, pd_jax checkpoint or hub id to start from", group=MODEL
    )
    output_dir: str = flag("./parallel-decoder-squad", "where the model and the run's state go", group=RUN)
    dataset_name: str = flag(
        "rajpurkar/squad", "hub id or file in SQuAD's format, or .jsonl of rounds (docs/sessions.md)", group=DATA
    )
    dataset_split: str = flag("train", "split of a hub data set", group=DATA)
    eval_dataset_name: str | None = flag(
        None, "data for the validation loss; for a hub data set its validation split is used", group=DATA
    )
    max_train_samples: int | None = flag(
        None, "use at most this many contexts, drawn by the seed", group=DATA, minimum=1
    )
    max_eval_samples: int | None = flag(None, "contexts for the validation loss", group=DATA, minimum=1)
    first_samples: bool = flag(False, "take the first contexts of the data instead of drawing them", group=DATA)
    max_branches: int = flag(3, "at most this many questions a context, beside the background", group=DATA, minimum=1)
    min_questions: int = flag(2, "contexts with fewer questions are left out", group=DATA, minimum=1)
    max_length: int = flag(1024, "tokens a row; several contexts share one", group=DATA, minimum=1)
    epochs: int = flag(1, "times over the data", group=OPTIM, minimum=1)
    eval_batch_size: int | None = flag(
        None, "rows of a validation batch, over all devices; as many as in a step if not given", group=OPTIM, minimum=1
    )
    max_steps: int | None = flag(None, "stop after this many optimiser steps", group=OPTIM, minimum=1)
