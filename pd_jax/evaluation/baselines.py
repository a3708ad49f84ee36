"""The same questions answered by `transformers` in torch, one by one, batched, or in one prompt: the baselines.

Every method decodes greedily, with the prompt token ids (one_prompt: the texts, numbered), the end-of-sequence set and
the vocabulary of our rows (rows that the tokenizer does not have are never chosen). torch is imported when it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pd_jax.data.squad import Context, background_text, to_tokens
from pd_jax.data.text import tokenise
from pd_jax.errors import InputError


@dataclass(frozen=True)
class Decoded:
    """What a way of answering made of some contexts."""

    ids: list[list[list[int]]]  # answer token ids [context][question], without the end-of-sequence token
    ended: list[list[bool]]  # [context][question]: there was an end-of-sequence token
    forwards: int  # calls of the model, the prefill included
    slots: int  # answers times columns computed, live or dead
    prefill_tokens: int  # prompt tokens fed, without padding


def check_weights(directory: Path) -> None:
    """Raise `InputError` when `transformers` cannot read the weights of `directory`."""
    if any(directory.glob("*.safetensors")):
        return
    if (directory / "params").is_dir():
        raise InputError(
            f"--base-model {directory} is a pd_jax checkpoint (params/) and transformers cannot read it; run "
            f"`python convert/flax_to_hf.py --checkpoint {directory} --output DIR` and pass DIR"
        )
    raise InputError(f"--base-model {directory} has no model*.safetensors; pass a Hugging Face model directory")


class Transformers:
    """A Hugging Face causal language model on `device` ("cpu" or "cuda") in `dtype`."""

    def __init__(self, directory: Path, tokenizer: Any, eos_ids: Sequence[int], dtype: str, device: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if device == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies float32 there
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=getattr(torch, dtype), local_files_only=True
        )
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise InputError(f"{directory}: {name} holds NaN or infinity; it is damaged, or training has diverged")
        unknown = sorted(set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values()))
        # Set on the model: what its own generation_config says (sampling, temperature) must not be mixed in.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=list(eos_ids), pad_token_id=eos_ids[0], suppress_tokens=unknown or None
        )
        self._model, self._torch, self._tokenizer = model.to(device).eval(), torch, tokenizer
        self._eos, self._device = frozenset(eos_ids), device

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, cache: Any = None) -> tuple[Any, int]:
        """(ids, ended) of every prompt, left-padded into one batch, and the number of forwards."""
        width = max(map(len, prompts))
        ids = self._torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = self._torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, past_key_values=cache, use_cache=True
            )
        rows = out[:, width:].tolist()
        cuts = [next((i for i, token in enumerate(row) if token in self._eos), None) for row in rows]
        return [(row[:cut], cut is not None) for row, cut in zip(rows, cuts, strict=True)], len(rows[0])

    def _prompts(self, context: Context) -> list[list[int]]:
        """The whole prompt of every question, the background copied into each."""
        sample = to_tokens(context, self._tokenizer, min(self._eos))
        return [[*sample.background, *branch.prompt] for branch in sample.branches]

    def sequential(self, contexts: Sequence[Context], max_new_tokens: int, turns: int | None = None) -> Decoded:
        """One question at a time; only the first `turns` of each context."""
        ids, ended, forwards, prefill = [], [], 0, 0
        for context in contexts:
            prompts = self._prompts(context)[:turns]
            parts = [self._generate([prompt], max_new_tokens) for prompt in prompts]
            ids.append([rows[0][0] for rows, _ in parts])
            ended.append([rows[0][1] for rows, _ in parts])
            forwards += sum(steps for _, steps in parts)
            prefill += sum(map(len, prompts))
        return Decoded(ids, ended, forwards, forwards, prefill)

    def batched(self, contexts: Sequence[Context], max_new_tokens: int, turns: int | None = None) -> Decoded:
        """All questions of all contexts in one left-padded batch, the background copied for each."""
        grouped = [self._prompts(context) for context in contexts]
        prompts = [prompt for group in grouped for prompt in group]
        rows, steps = self._generate(prompts, max_new_tokens)
        answers = iter(rows)
        groups = [[next(answers) for _ in group] for group in grouped]
        return Decoded(
            [[ids for ids, _ in group] for group in groups],
            [[ended for _, ended in group] for group in groups],
            steps,
            steps * len(prompts),
            sum(map(len, prompts)),
        )

    def one_prompt(self, contexts: Sequence[Context], max_new_tokens: int, turns: int | None = None) -> Decoded:
        """All questions of a context in one prompt, numbered; then "Answer 1:", "Answer 2:"... are completed in turn.

        The key-value cache is kept from turn to turn, so that everything is fed once.
        """
        from transformers import DynamicCache

        encode = partial(tokenise, self._tokenizer)

        ids, ended, forwards, prefill = [], [], 0, 0
        for context in contexts:
            text = [encode(background_text(context))]
            text += [encode(f"Question {i}: {q.text}\n") for i, q in enumerate(context.questions, start=1)]
            so_far, cache = [token for piece in text for token in piece], DynamicCache()
            prefill += len(so_far)
            answers: list[tuple[list[int], bool]] = []
            for turn in range(1, len(context.questions[:turns]) + 1):
                cue = encode(f"{chr(10) if turn > 1 else ''}Answer {turn}:")
                rows, steps = self._generate([so_far + cue], max_new_tokens, cache)
                so_far = so_far + cue + rows[0][0]
                forwards, prefill = forwards + steps, prefill + len(cue)
                answers.append(rows[0])
            ids.append([answer for answer, _ in answers])
            ended.append([end for _, end in answers])
        return Decoded(ids, ended, forwards, forwards, prefill)
