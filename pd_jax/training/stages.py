"""The two stages, pretraining and finetuning: flags become checked values, data becomes batches, and the loop runs."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp

from pd_jax.attention import Call, check_backend
from pd_jax.cli import given
from pd_jax.config import MIX, SECTION, LoraConfig
from pd_jax.data import fineweb, pipeline, rounds, squad
from pd_jax.data.prints import data_prints
from pd_jax.data.text import BadRows
from pd_jax.errors import InputError
from pd_jax.files import (
    check_agreement,
    check_base,
    check_data,
    check_needed,
    check_output,
    claim,
    find_model,
    fingerprint,
    load_adapter,
    load_config,
    load_eos_ids,
    load_tokenizer,
    lora_flags,
    read_config_json,
)
from pd_jax.layout import TokenSample
from pd_jax.machines import Trace, start_processes
from pd_jax.mesh import check_batch, check_model, compile_target, make_mesh
from pd_jax.training.flags import FinetuneFlags, PretrainFlags, TrainFlags
from pd_jax.training.loop import Run, Start, train
from pd_jax.training.step import Optimisation, StepSettings
from pd_jax.watching.monitor import say

PRETRAINED_BIAS_START = -2.0  # of weights that never saw columns: ajar; from 0 they unlearn, from -8 it never opens


def pretrain(flags: PretrainFlags) -> None:
    """Columnar pretraining: web segments as branches without a background, every next token of a branch counts."""
    start_processes(flags.coordinator_address, flags.num_processes, flags.process_id)
    with claim(Path(flags.output_dir)):
        if not finished(flags):
            _pretrain(flags)


def _pretrain(flags: PretrainFlags) -> None:
    if flags.streaming and flags.workers:
        raise InputError(f"--workers {flags.workers} cannot share a stream; leave out --streaming or --workers")
    length = flags.branch_count * flags.seq_length
    start, settings, bad = *prepare(flags, length), BadRows(flags.skip_bad_rows)
    rows = row_settings(flags, start, length)
    documents = fineweb.load_documents(
        flags.dataset_name,
        flags.dataset_config,
        flags.dataset_split,
        streaming=flags.streaming,
        max_samples=flags.max_samples,
        local_files_only=flags.local_files_only,
    )

    def batches(segments: fineweb.Documents, epochs: int | None = None) -> grain.DatasetIterator:
        return pipeline.pretrain_batches(
            segments,
            rows,
            branch_count=flags.branch_count,
            rows_per_step=rows_per_step(flags),
            workers=flags.workers,
            epochs=epochs,
            bad=bad,
        )

    def cut(documents: fineweb.Documents, name: str = flags.dataset_name) -> fineweb.Documents:
        return fineweb.segments(documents, start.tokenizer, flags.seq_length, start.end, name=name, bad=bad)

    held_out = None
    if flags.eval_dataset_name is not None:
        name, local = flags.eval_dataset_name, flags.local_files_only
        held_out = partial(batches, cut(fineweb.load_documents(name, max_samples=64, local_files_only=local), name), 1)
        held_out()  # too few documents are refused here, not in the middle of the run
    run = run_of(flags, flags.max_steps, length)
    train(start, run, optimisation(flags), settings, data=batches(cut(documents)), held_out=held_out, bad=bad)


def finetune(flags: FinetuneFlags) -> None:
    """Finetuning on questions grouped by context: answer tokens and their end count."""
    start_processes(flags.coordinator_address, flags.num_processes, flags.process_id)
    with claim(Path(flags.output_dir)):
        if not finished(flags):
            _finetune(flags)


def _finetune(flags: FinetuneFlags) -> None:
    start, settings, bad = *prepare(flags, flags.max_length), BadRows(flags.skip_bad_rows)
    rows = row_settings(flags, start, flags.max_length)

    def samples(name: str, split: str, limit: int | None) -> list[TokenSample]:
        drawn = None if flags.first_samples else flags.seed
        if rounds.holds_rounds(name):
            check_needed(given(flags), "data in SQuAD's format", False, "max_branches", "min_questions")
            whole = rounds.draw(rounds.load_rounds(name, start.tokenizer, start.end, bad), limit, drawn)
            kept, line = squad.fit_all(whole, flags.max_length, name)
        else:
            contexts = squad.load_squad(name, split, flags.local_files_only, bad)
            contexts = squad.select(contexts, flags.max_branches, flags.min_questions, limit, drawn)
            kept, line = squad.fitted_samples(contexts, start.tokenizer, start.end, flags.max_length, name)
        say(line)
        return kept

    def batches(
        samples: list[TokenSample], size: int, epochs: int, limit: int | None = None
    ) -> tuple[grain.DatasetIterator, int]:
        """The batches of `size` rows, and how many there are."""
        packed = pipeline.finetune_rows([len(s) for s in samples], flags.max_length, epochs, flags.seed)
        steps = -(-len(packed) // size)
        if limit is not None and limit < steps:
            steps, packed = limit, packed[: limit * size]
        used = sum(len(samples[i]) for row in packed for i in row) / (len(packed) * flags.max_length)
        say(f"{len(packed)} rows of {flags.max_length} tokens, {used:.0%} of them used")
        made = pipeline.finetune_batches(samples, packed, rows, rows_per_step=size, workers=flags.workers)
        return made, steps

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
    run = run_of(flags, steps, flags.max_length)
    train(start, run, optimisation(flags), settings, data=data, held_out=held_out, bad=bad)


# ---------------------------------------------------------------- from flags to values


def finished(flags: TrainFlags) -> bool:
    """Whether this very run is over; says so. Raises `InputError` when --output-dir holds something else."""
    over = not check_output(Path(flags.output_dir), plain(flags))
    if over:
        say(f"{flags.output_dir} holds the finished run of this very command; nothing to do")
    return over


def plain(flags: TrainFlags) -> dict:
    """The flags as run.json has them."""
    return json.loads(json.dumps(dataclasses.asdict(flags)))


def rows_per_step(flags: TrainFlags) -> int:
    return flags.batch_size * flags.gradient_accumulation_steps


def row_settings(flags: TrainFlags, start: Start, length: int) -> pipeline.RowSettings:
    return pipeline.RowSettings(
        length=length,
        align=start.config.align or "left",
        pad_id=start.pad,
        seed=flags.seed,
        mix=flags.mix_shares if start.config.visibility == MIX else None,
    )


def optimisation(flags: TrainFlags) -> Optimisation:
    return Optimisation(
        flags.learning_rate, flags.warmup_ratio, flags.weight_decay, flags.max_grad_norm, flags.sibling_bias_lr
    )


def run_of(flags: PretrainFlags | FinetuneFlags, steps: int, row_length: int) -> Run:
    prints = data_prints((flags.dataset_name, flags.eval_dataset_name), flags.local_files_only)
    check_data(Path(flags.output_dir), prints)
    return Run(
        output=Path(flags.output_dir),
        flags=plain(flags),
        data=prints,
        steps=steps,
        accumulation=flags.gradient_accumulation_steps,
        rows=rows_per_step(flags),
        row_length=row_length,
        logging_steps=flags.logging_steps,
        eval_steps=flags.eval_steps,
        save_steps=flags.save_steps,
        keep=flags.keep,
        profile=flags.profile,
    )


def prepare(flags: TrainFlags, row_length: int) -> tuple[Start, StepSettings]:
    """Read and check everything that a run on rows of so many tokens needs but its weights. Raises `InputError`;
    writes nothing."""
    Trace.parse(flags.profile or "1:1")
    if len(flags.mix_shares) != 3 or sum(flags.mix_shares) <= 0:
        raise InputError(
            f"--mix-shares {' '.join(map(str, flags.mix_shares))}: give three shares, of columns, isolated and prompts"
        )
    directory = find_model(flags.model_name, flags.local_files_only)
    adapter = None if flags.adapter is None else find_model(flags.adapter, flags.local_files_only)
    config = load_config(directory, flags.pair_indices, adapter)
    visibility, align = flags.visibility or config.visibility or "columns", flags.align or config.align or "left"
    if config.trained_otherwise(visibility, align):
        say(
            f"{flags.model_name} was trained with visibility {config.visibility}, align {config.align}; this run "
            f"trains it with visibility {visibility}, align {align}"
        )
    untouched = SECTION not in read_config_json(directory) and adapter is None and not flags.random_init
    new = untouched and visibility != "isolated"  # pretrained weights that will see columns for the first time
    asked, bias = given(flags), config.sibling_bias or (new if flags.sibling_bias is None else flags.sibling_bias)
    check_agreement(asked, {"sibling_bias": True} if config.sibling_bias else {}, directory)
    check_needed(asked, "--sibling-bias", bias, "sibling_bias_lr")
    check_needed(asked, "--visibility mix", visibility == MIX, "mix_shares")
    check_needed(asked, "--use-lora", flags.use_lora or adapter, *lora_flags(LoraConfig()))
    if flags.sibling_bias_start is not None and (config.sibling_bias or not bias):
        why = f"{flags.model_name} has a trained sibling_bias" if config.sibling_bias else "there is no --sibling-bias"
        raise InputError(f"--sibling-bias-start {flags.sibling_bias_start} is for a new bias, but {why}; leave it out")
    bias_start = flags.sibling_bias_start
    if bias_start is None:
        bias_start = 0.0 if flags.random_init or config.visibility is not None else PRETRAINED_BIAS_START
    if new and bias and flags.sibling_bias is None:
        say(
            f"{flags.model_name} has never seen columns: it gets a sibling_bias that begins at {bias_start:g}, without "
            "which its branches cannot tell their own text from their siblings' (--no-sibling-bias trains without)"
        )
    config = dataclasses.replace(config, sibling_bias=bias, visibility=visibility, align=align)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    eos = load_eos_ids(directory, tokenizer)
    mesh = make_mesh(*flags.mesh)
    check_model(config, mesh)
    check_batch(flags.batch_size, mesh)
    adapters = lora = None
    if adapter is not None:
        adapters, lora = load_adapter(adapter, config, directory)  # rank and scale are those of the adapter
        check_agreement(asked, lora_flags(lora), adapter)
    elif flags.use_lora:
        lora = LoraConfig(flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
    base = None
    if lora is not None:
        name = str(directory.absolute()) if Path(flags.model_name).is_dir() else flags.model_name
        base = {"name": name, "fingerprint": fingerprint(directory)}
        check_base(Path(flags.output_dir), base)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = jnp.dtype({"auto": "float32" if on_cpu else "bfloat16"}.get(flags.dtype, flags.dtype))
    with jax.set_mesh(mesh):
        call = Call(*compile_target(), visibility, row_length, config.head_dim, dtype, config.sibling_bias)
    check_backend(flags.attention, call)
    start = Start(
        directory=directory,
        config=config,
        random_init=flags.random_init,
        sibling_bias_start=bias_start,
        adapters=adapters,
        lora=lora,
        base=base,
        tokenizer=tokenizer,
        end=tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0],
        pad=tokenizer.pad_token_id or 0,
        mesh=mesh,
    )
    return start, StepSettings(dtype, flags.remat, flags.attention, flags.seed)
