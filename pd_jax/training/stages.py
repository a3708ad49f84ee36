"""Training: columnar pretraining, finetuning, and the one linear loop that both run."""

import dataclasses
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from rich.progress import track

from pd_jax.attention import Call, check_backend
from pd_jax.config import LoraConfig
from pd_jax.data import fineweb, pipeline, squad
from pd_jax.errors import InputError
from pd_jax.files import (
    find_model,
    fingerprint,
    load_adapter,
    load_config,
    load_eos_ids,
    load_tokenizer,
)
from pd_jax.layout import fit
from pd_jax.mesh import (
    check_batch,
    check_model,
    compile_target,
    make_mesh,
)
from pd_jax.training.checkpoints import check_base, check_output
from pd_jax.training.flags import FinetuneFlags, PretrainFlags, TrainFlags
from pd_jax.training.loop import Start, rows_per_step, train
from pd_jax.training.monitor import (
    Trace,
    say,
)
from pd_jax.training.processes import start_processes

# ---------------------------------------------------------------- the two stages


def pretrain(flags: PretrainFlags) -> None:
    """Columnar pretraining: web segments as branches without a background, every next token of a branch counts."""
    start_processes(flags)
    if finished(flags):
        return
    if flags.streaming and flags.workers:
        raise InputError(f"--workers {flags.workers} cannot share a stream; leave out --streaming or --workers")
    length = flags.branch_count * flags.seq_length
    start = prepare(flags, length)
    align = start.config.align or "left"
    documents = fineweb.load_documents(
        flags.dataset_name,
        flags.dataset_config,
        flags.dataset_split,
        flags.streaming,
        flags.max_samples,
        flags.local_files_only,
    )

    def batches(segments: fineweb.Documents, epochs: int | None = None) -> grain.DatasetIterator:
        return pipeline.pretrain_batches(
            segments,
            flags.branch_count,
            flags.seq_length,
            rows_per_step(flags),
            flags.seed,
            align,
            start.pad,
            flags.workers,
            epochs,
        )

    def cut(documents: fineweb.Documents) -> fineweb.Documents:
        return fineweb.segments(documents, start.tokenizer, flags.seq_length, start.end)

    held_out = None
    if flags.eval_dataset_name is not None:
        name, local = flags.eval_dataset_name, flags.local_files_only
        held_out = partial(batches, cut(fineweb.load_documents(name, max_samples=64, local_files_only=local)), 1)
        held_out()  # too few documents are refused here, not in the middle of the run
    data = batches(cut(documents))
    train(flags, start, data, flags.max_steps, length, held_out)


def finetune(flags: FinetuneFlags) -> None:
    """Finetuning on questions grouped by context: answer tokens and their end count."""
    start_processes(flags)
    if finished(flags):
        return
    start = prepare(flags, flags.max_length)
    align = start.config.align or "left"

    def samples(name: str, split: str, limit: int | None) -> list:
        contexts = squad.load_squad(name, split, flags.local_files_only)
        contexts = squad.select(contexts, flags.max_branches, flags.min_questions, limit)
        told = track(contexts, "tokenising", disable=jax.process_index() > 0)
        whole = [squad.to_tokens(context, start.tokenizer, start.end) for context in told]
        fitted = [fit(sample, flags.max_length) for sample in whole]
        kept = [sample for sample in fitted if sample is not None]
        cut = sum(new is not None and new is not old for new, old in zip(fitted, whole, strict=True))
        say(
            f"{name}: {len(kept)} contexts, {sum(len(s.branches) for s in kept)} questions; {cut} backgrounds "
            f"shortened and {len(whole) - len(kept)} contexts dropped to fit --max-length {flags.max_length}"
        )
        if not kept:
            raise InputError(
                f"no context of {name} fits --max-length {flags.max_length}: the shortest needs "
                f"{min(len(s) - len(s.background) for s in whole)} tokens; raise it or lower --max-branches"
            )
        return kept

    def batches(samples: list, size: int, epochs: int, limit: int | None = None) -> tuple[grain.DatasetIterator, int]:
        rows = pipeline.finetune_rows([len(s) for s in samples], flags.max_length, epochs, flags.seed)
        steps = -(-len(rows) // size)
        if limit is not None and limit < steps:
            steps, rows = limit, rows[: limit * size]
        used = sum(len(samples[i]) for row in rows for i in row) / (len(rows) * flags.max_length)
        say(f"{len(rows)} rows of {flags.max_length} tokens, {used:.0%} of them used")
        return (
            pipeline.finetune_batches(samples, rows, flags.max_length, size, align, start.pad, flags.workers),
            steps,
        )

    name = flags.eval_dataset_name or (None if Path(flags.dataset_name).exists() else flags.dataset_name)
    if name is None and (flags.max_eval_samples or flags.eval_batch_size):
        raise InputError(
            f"--max-eval-samples and --eval-batch-size: {flags.dataset_name} is a file and has no validation split; "
            "pass --eval-dataset-name too"
        )
    trained_on = samples(flags.dataset_name, flags.dataset_split, flags.max_train_samples)
    data, steps = batches(trained_on, rows_per_step(flags), flags.epochs, flags.max_steps)
    held_out = None
    if name is not None:
        kept = samples(name, "validation", flags.max_eval_samples)
        size = flags.eval_batch_size or rows_per_step(flags)
        check_batch(size, start.mesh)
        held_out = lambda: batches(kept, size, 1)[0]  # noqa: E731
    train(flags, start, data, steps, flags.max_length, held_out)


def finished(flags: TrainFlags) -> bool:
    """Whether this very run is over; says so. Raises `ValueError` when --output-dir holds something else."""
    over = not check_output(flags)
    if over:
        say(f"{flags.output_dir} holds the finished run of this very command; nothing to do")
    return over


def prepare(flags: TrainFlags, row_length: int) -> Start:
    """Read and check everything that a run on rows of so many tokens needs but its weights. Raises `ValueError`;
    writes nothing."""
    Trace.parse(flags.profile or "1:1")
    directory = find_model(flags.model_name, flags.local_files_only)
    adapter = None if flags.adapter is None else find_model(flags.adapter, flags.local_files_only)
    config = load_config(directory, flags.pair_indices, adapter)
    visibility, align = flags.visibility or config.visibility or "columns", flags.align or config.align or "left"
    if (config.visibility or visibility, config.align or align) != (visibility, align):
        say(
            f"{flags.model_name} was trained with visibility {config.visibility}, align {config.align}; this run "
            f"trains it with visibility {visibility}, align {align}"
        )
    bias = config.sibling_bias or flags.sibling_bias
    config = dataclasses.replace(config, sibling_bias=bias, visibility=visibility, align=align)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    eos = load_eos_ids(directory, tokenizer)
    mesh = make_mesh(*flags.mesh)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    adapters = lora = None
    if adapter is not None:
        adapters, lora = load_adapter(adapter, config, directory)  # rank and scale are those of the adapter
    elif flags.use_lora:
        lora = LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    if lora is not None and flags.sibling_bias:
        raise InputError(
            "--sibling-bias is a weight of the base, which --use-lora does not train; leave one of them out"
        )
    base = None
    if lora is not None:
        name = str(directory.absolute()) if Path(flags.model_name).is_dir() else flags.model_name
        base = {"name": name, "fingerprint": fingerprint(directory)}
        check_base(flags, base)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = jnp.dtype({"auto": "float32" if on_cpu else "bfloat16"}.get(flags.dtype, flags.dtype))
    with jax.set_mesh(mesh):
        call = Call(*compile_target(), visibility, row_length, config.head_dim, dtype, config.sibling_bias)
    check_backend(flags.attention, call)
    return Start(
        directory=directory,
        config=config,
        adapters=adapters,
        lora=lora,
        base=base,
        tokenizer=tokenizer,
        end=tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0],
        pad=tokenizer.pad_token_id or 0,
        mesh=mesh,
        dtype=dtype,
    )
