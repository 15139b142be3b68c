"""One loaded model: prompts in, traces, answers and generations out, modules under TransformerLens's names.

    lalm.embed  lalm.blocks[l]  lalm.ln_final  lalm.unembed      the language model
        blocks[l].ln1  .attn (.q .k .v .o)  .ln2  .mlp (.gate .in .out)
    lalm.audio_encoder.blocks[i]  lalm.audio_projector            the audio side

A batch of labelled positions goes where a model's inputs go:

    batch = lalm.prompt("dog.wav", answer="The sound file's animal is", attribute="animal")
    with lalm.trace(batch):
        z = lalm.blocks[3].attn.o.input.save()
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import pandas as pd
import torch
from jaxtyping import Float, Int
from nnsight import save
from nnsight.modeling.transformers import TransformersModel
from nnsight.tracing.tracer import WithBlockNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip, as_clip
from audio_lens_plugin.bridge import AudioBridge, bridge_of, positions_in_mask, shared_names
from audio_lens_plugin.checks import CheckResult, check
from audio_lens_plugin.labels import Form, Labels, form_after, label_tokens
from audio_lens_plugin.patch import Family, build_batch
from audio_lens_plugin.prompts import Prompt, PromptBatch, PromptError

TRACE_GENERATION = TransformersModel.generate.__wrapped__


@dataclass(frozen=True, repr=False)
class Answers:
    """What the model says to each row of a batch, restricted to labels.

    Attributes:
        labels: the labels it could choose from.
        log_probs: log-probability of each label over the whole vocabulary: of its first token, or of all its tokens
            where whole labels were read.
        texts: the model's free continuation of each row, where it was asked for.
    """

    labels: Labels
    log_probs: Float[torch.Tensor, "batch labels"]
    texts: tuple[str, ...] | None = None

    @property
    def choice(self) -> Int[torch.Tensor, " batch"]:
        """Index of the label with the highest probability."""
        return self.log_probs.argmax(-1)

    @property
    def words(self) -> list[str]:
        """The chosen label of each row."""
        return [self.labels.words[index] for index in self.choice.tolist()]

    @property
    def probabilities(self) -> Float[torch.Tensor, "batch labels"]:
        """Probabilities among the labels alone: rows add up to 1."""
        return self.log_probs.softmax(-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per batch row: the choice, the free text, and the probability of every label among the labels."""
        frame = pd.DataFrame(self.probabilities.numpy(), columns=pd.Index(self.labels.words))
        frame.insert(0, "answer", self.words)
        if self.texts is not None:
            frame.insert(1, "text", list(self.texts))
        return frame

    def __repr__(self) -> str:
        return self.to_frame().to_string(float_format="{:.3f}".format)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format="{:.3f}".format)


class LALM:
    """A large audio-language model with labelled positions. Made by `audio_lens_plugin.load`.

    Attributes:
        family: the family that the model belongs to.
        module: the transformers module.
        processor: its processor.
        model: the nnsight model around the module.
        name: repo id, folder name, or toy name.
        revision: commit or branch of the checkpoint, where known.
    """

    def __init__(
        self, module: PreTrainedModel, processor: Any, family: Family, name: str, revision: str | None = None
    ) -> None:
        self.family, self.module, self.processor = family, module.eval(), processor
        self.name, self.revision = name, revision
        self._transcripts: dict[str, str] = {}
        placed = {} if getattr(module, "hf_device_map", None) else {"device": module.device}
        with _quiet_transformers():  # it warns at length that an audio model is no text generator
            self.model = TransformersModel(
                module,
                task="text-generation",
                tokenizer=processor.tokenizer,
                rename=shared_names(family, module.config),
                **placed,
            )

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def embed(self) -> Any:
        """Token embedding (nnsight envoy); audio positions are overwritten after it."""
        return self.model.embed

    @property
    def blocks(self) -> Any:
        """The language model's blocks (nnsight envoys), layers from 0."""
        return self.model.blocks

    @property
    def ln_final(self) -> Any:
        """The final norm (nnsight envoy)."""
        return self.model.ln_final

    @property
    def unembed(self) -> Any:
        """The unembedding (nnsight envoy)."""
        return self.model.unembed

    @property
    def audio_encoder(self) -> Any:
        """The audio tower (nnsight envoy), with its own ``blocks``."""
        return self.model.audio_encoder

    @property
    def audio_projector(self) -> Any:
        """The projector from audio states to the language model's width (nnsight envoy)."""
        return self.model.audio_projector

    @property
    def n_layers(self) -> int:
        """Number of blocks of the language model."""
        return len(self.blocks)

    @property
    def d_head(self) -> int:
        """Width of one attention head of the language model."""
        text = self.module.config.get_text_config()
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def n_heads(self) -> int:
        """Number of attention heads of the language model's blocks (query heads, where keys have fewer)."""
        return self.module.config.get_text_config().num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model's weights (some families keep their ears in float32)."""
        return self.ln_final._module.weight.dtype

    @property
    def attention(self) -> str:
        """The attention implementation that runs: ``sdpa``, ``eager``, ..."""
        return self.module.config._attn_implementation

    @property
    def fingerprint(self) -> str:
        """Tells two checkpoints of one name apart: a hash of the configuration and of the final norm's weights."""
        state = self.ln_final._module.state_dict()
        weights = b"".join(state[name].float().cpu().numpy().tobytes() for name in sorted(state))
        return hashlib.sha256(self.module.config.to_json_string().encode() + weights).hexdigest()[:16]

    def prompt(
        self,
        clips: Any = None,
        question: str | Sequence[str] | None = None,
        options: Sequence[str] | None = None,
        answer: str | Sequence[str] | None = None,
        system: str | None = None,
        *,
        attribute: str | Sequence[str] | None = None,
        transcript: str | Sequence[str] | None = None,
        rate: int | None = None,
        truncate: bool = False,
    ) -> PromptBatch:
        """Build a labelled batch.

        Args:
            clips: one recording (anything `audio.as_clip` takes), for as many rows as there are questions or answers;
                a list for one row each; a list in the list for a row with several clips, None in the list for a row
                without; None for no clip at all.
            question: the user's words; one for all rows, or one per row.
            options: possible answers, named after the question.
            answer: the assistant's turn, left open; one for all rows, or one per row.
            system: the system turn instead of the family's default.
            attribute: the word in answer or question that names the attribute; one for all rows, or one per row.
            transcript: what is said in the clips, for models that read a transcription (DeSTA); one for all rows, or
                one per row. Left out, the model makes it, once per clip.
            rate: Hz of clips given as bare arrays.
            truncate: cut clips longer than the model's window, with a warning, instead of refusing them.

        Raises:
            AudioError: a clip that cannot be used.
            PromptError: numbers of clips, questions and answers that do not fit, or words with special tokens.
        """
        rows = _rows_of_clips(clips, question, answer)
        per_row = [
            _per_row(name, value, len(rows))
            for name, value in (
                ("question", question),
                ("answer", answer),
                ("attribute", attribute),
                ("transcript", transcript),
            )
        ]
        prompts = [
            Prompt(
                clips=tuple(_with_words(as_clip(clip, rate), said) for clip in row),
                question=asked,
                options=None if options is None else tuple(options),
                answer=opened,
                system=system,
                attribute=named,
            )
            for row, asked, opened, named, said in zip(rows, *per_row, strict=True)
        ]
        return self.batch(prompts, truncate)

    def batch(self, prompts: Sequence[Prompt], truncate: bool = False) -> PromptBatch:
        """Build a labelled batch from `Prompt` objects (see `patch.build_batch`).

        Where the language model reads a transcription, clips without one are transcribed first, each once per model.
        """
        if self.family.transcribes:
            prompts = self._transcribed(prompts, truncate)
        return build_batch(self.family, self.processor, prompts, truncate)

    def inputs(self, batch: PromptBatch | Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the model takes it: verified, floats in the model's dtype, each tensor where it is needed.

        Raises:
            PromptError: tensors whose audio would be dropped, cut or expanded inside the model.
        """
        tensors = dict(batch.inputs if isinstance(batch, PromptBatch) else batch)
        self.family.verify(self.module, tensors)
        return {name: self._placed(name, value) for name, value in tensors.items()}

    def trace(self, batch: PromptBatch | Mapping[str, Any], **kwargs: Any) -> Any:
        """nnsight's trace over this batch: ``with lalm.trace(batch): ...``. Keywords go to the model's forward."""
        return self.model.trace(**self.inputs(batch), **kwargs)

    @no_type_check  # a runtime checker would stand between nnsight and the caller's frame, which it reads
    def generate(self, batch: PromptBatch | Mapping[str, Any], **kwargs: Any) -> Any:
        """Generate token ids ``[batch, pos + new]``, or trace the generation: ``with lalm.generate(batch) as tracer``.

        Keywords go to transformers' ``generate``. As nnsight's own `generate`, it is a trace in a ``with`` statement
        and a plain call elsewhere.
        """
        run = TRACE_GENERATION.__get__(self.model)
        inputs = {**self.inputs(batch), **kwargs}
        tracer = self.model.trace(fn=run, **inputs)
        try:
            tracer.capture()
        except WithBlockNotFoundError:
            with torch.no_grad():
                return self.model.interleave(run, **inputs)
        return tracer

    def labels(self, words: Sequence[str], form: Form = "spaced") -> Labels:
        """Label words as this model's tokens (see `labels.label_tokens`)."""
        return label_tokens(self.tokenizer, words, form)

    def answer(
        self,
        batch: PromptBatch,
        labels: Labels | Sequence[str],
        *,
        whole: bool = False,
        new_tokens: int = 0,
    ) -> Answers:
        """What the model says next, restricted to labels, and freely if asked.

        Args:
            labels: label words, read as what goes on from the opened answer (" dog" after "is", "dog" where nothing
                is opened), or their tokens in the form of your choice (`LALM.labels`).
            whole: read whole labels by teacher-forced log-probability, summed over a label's tokens, instead of first
                tokens. Labels may then share their first token.
            new_tokens: also generate up to this many tokens greedily (`Answers.texts`).

        Raises:
            LabelError: two labels begin with the same token, without ``whole``; or label words for rows of which only
                some open an answer.
        """
        if not isinstance(labels, Labels):
            labels = self.labels(labels, form_after(prompt.answer for prompt in batch.prompts))
        log_probs = self._whole_labels(batch, labels) if whole else self._first_tokens(batch, labels)
        texts = None
        if new_tokens:
            ids = self.generate(batch, max_new_tokens=new_tokens, do_sample=False)
            new = ids[:, batch.inputs["input_ids"].shape[1] :]
            texts = tuple(self.tokenizer.batch_decode(new, skip_special_tokens=True))
        return Answers(labels, log_probs, texts)

    def check(self, clips: Sequence[Any] | None = None) -> CheckResult:
        """Whether this model, here and now, does what every experiment takes for granted (see `checks`).

        Args:
            clips: two recordings of your own; two synthetic sounds if None.
        """
        return check(self, clips)

    def bridge(self) -> AudioBridge:
        """This model as a `transformer_lens.TransformerBridge` that takes batches: same weights, no copy, own hooks."""
        return bridge_of(self.family, self.module, self.tokenizer, self.name, self.inputs)

    def __repr__(self) -> str:
        return (
            f"LALM({self.name!r}, family={self.family.name}, {self.n_layers} layers, {self.dtype}, "
            f"attention={self.attention}, device={self.module.device})"
        )

    def _placed(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        module = getattr(self.model, self.family.entrance(name))._module
        hook = getattr(module, "_hf_hook", None)  # accelerate's, where weights are offloaded
        weight = next(module.parameters())
        device = getattr(hook, "execution_device", None) or weight.device
        return value.to(device, weight.dtype if value.is_floating_point() else value.dtype)

    def _transcribed(self, prompts: Sequence[Prompt], truncate: bool) -> list[Prompt]:
        silent = {clip.digest: clip for prompt in prompts for clip in prompt.clips if clip.transcript is None}
        unheard = [clip for digest, clip in silent.items() if digest not in self._transcripts]
        if unheard:
            words = self.family.transcribe(self.module, self.processor, unheard, truncate)
            self._transcripts |= {clip.digest: said for clip, said in zip(unheard, words, strict=True)}

        def heard(clip: Clip) -> Clip:
            return clip if clip.transcript is not None else replace(clip, transcript=self._transcripts[clip.digest])

        return [replace(prompt, clips=tuple(map(heard, prompt.clips))) for prompt in prompts]

    def _first_tokens(self, batch: PromptBatch, labels: Labels) -> Float[torch.Tensor, "batch labels"]:
        last, ids = batch.at("last"), labels.first
        with torch.no_grad(), self.trace(batch, use_cache=False) as tracer:
            normed = self.ln_final.output[last.rows, last.cols]
            logits, log_partition, _, _ = ops.vocabulary_scores(normed, self.unembed, ids, 0)
            log_probs = save(logits - log_partition[:, None])
            tracer.stop()
        return log_probs.cpu()

    def _whole_labels(self, batch: PromptBatch, labels: Labels) -> Float[torch.Tensor, "batch labels"]:
        """The prompt runs once; each label's tokens then follow on its keys and values, which are cut off again."""
        inputs = self.inputs(batch)
        with torch.no_grad():
            # Positions are said, and said alike in both passes: left to themselves, some models would count padding.
            positions = positions_in_mask(inputs["attention_mask"])
            prompt = self.module(**inputs, position_ids=positions, use_cache=True)
            first = prompt.logits[:, -1].float().log_softmax(-1)
            sums = []
            for tokens in labels.tokens:
                total = first[:, tokens[0]]
                if len(tokens) > 1:
                    total = total + self._continuation(inputs, prompt.past_key_values, tokens)
                sums.append(total)
        return torch.stack(sums, dim=-1).cpu()

    def _continuation(self, inputs: Mapping[str, Any], cache: Any, tokens: Sequence[int]) -> torch.Tensor:
        mask = inputs["attention_mask"]
        fed = torch.tensor(tokens[:-1], device=mask.device).expand(len(mask), -1)
        longer = torch.cat([mask, torch.ones_like(fed)], dim=1)
        logits = self.module(
            input_ids=fed,
            attention_mask=longer,
            position_ids=positions_in_mask(longer)[:, -fed.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-fed.shape[1])
        follows = torch.tensor(tokens[1:], device=logits.device).expand(len(mask), -1)
        return logits.float().log_softmax(-1).gather(-1, follows[..., None]).sum((1, 2))


def _rows_of_clips(clips: Any, *texts: Any) -> list[list[Any]]:
    """The clips of each row; one recording, or none, serves as many rows as there are texts."""
    if isinstance(clips, (list, tuple)):
        return [list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in clips]
    rows = max((len(text) for text in texts if isinstance(text, (list, tuple))), default=1)
    return [[] if clips is None else [clips] for _ in range(rows)]


def _with_words(clip: Clip, transcript: str | None) -> Clip:
    return clip if transcript is None else replace(clip, transcript=transcript)


def _per_row(name: str, value: str | Sequence[str] | None, rows: int) -> list[str | None]:
    if value is None or isinstance(value, str):
        return [value] * rows
    if len(value) != rows:
        raise PromptError(f"{len(value)} values for {name} do not fit {rows} rows; give one, or one per row.")
    return list(value)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
