"""Model class for lm-eval that runs a checkpoint with barber_jax; importing this module registers it as `barber_jax`.

Sequences of similar length share a batch. They are padded to one of a few lengths, and batches hold about a fixed
number of tokens, so that only a handful of programs is compiled. Results match lm-eval's `hf` model: same tokens, same
truncation from the left, natural logarithms.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from barber_jax.console.errors import BarberError
from barber_jax.console.terminal import plain_console
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.data.text import tokenizing
from barber_jax.devices.mesh import Devices
from barber_jax.devices.options import parse_mesh
from barber_jax.devices.settings import set_precision
from barber_jax.forward.resident import ResidentModel
from barber_jax.models import build_model

MIN_PADDED_LENGTH = 32
"""Sequences are padded to at least this many tokens."""
CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS = 2048, 16384
"""Default number of tokens in a batch, on CPU and on other devices."""
DEFAULT_NEW_TOKENS = 256
"""Tokens generated at most where a task sets no limit; lm-eval's default."""
STOP_CHECK_INTERVAL = 16
"""Tokens generated between two checks for stop sequences."""


def padded_length(length: int, max_length: int) -> int:
    """Length to which a sequence of `length` tokens is padded: 32, 48, 64, 96, 128, ..., at most `max_length`."""
    size = MIN_PADDED_LENGTH
    while size < length:
        # Powers of two, and the midpoints between them.
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, max_length))


@register_model("barber_jax")
class BarberLM(TemplateLM):
    """A checkpoint as a language model for lm-eval.

    Args:
        pretrained: checkpoint folder, Hub id or .gguf file.
        batch_size: sequences in a batch; None or "auto": about 2048 tokens on CPU, 16384 on other devices.
        dtype: float32 or bfloat16, of activations and matrix products.
        mesh: `data=N,model=M`; None for one device.
        max_length: longest sequence in tokens; None for the model's number of positions.
        add_bos_token: whether encoding adds special tokens; None for the tokenizer's default.
        max_batch_size, device: ignored; lm-eval passes them to every model. Choose the device with JAX_PLATFORMS (cpu,
            cuda, tpu).

    Raises:
        BarberError: the checkpoint cannot be loaded, or has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        dtype: str = "float32",
        mesh: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if dtype not in ("float32", "bfloat16"):
            raise BarberError(f"dtype {dtype!r} is neither float32 nor bfloat16")
        set_precision()
        checkpoint = open_checkpoint(pretrained)
        model = build_model(checkpoint.config, jnp.dtype(dtype))
        check_tensors(checkpoint, model)
        self.tokenizer = checkpoint.tokenizer()
        self._devices = Devices.of(parse_mesh(mesh))
        # `_batches` makes the batch size a multiple of the data axis, so only the model axis is really checked.
        self._devices.check(model.block(), self._devices.shape[0])
        self._name, self._add_bos_token = pretrained, add_bos_token
        # Chat models may end a turn with a token other than the tokenizer's end-of-text token.
        ends = checkpoint.config.get("eos_token_id")
        self._end_tokens = [self.eot_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
        self.max_length = min(int(max_length or model.positions), model.positions)
        self._batch_size = None if batch_size in (None, "auto") else int(batch_size)
        self._model = ResidentModel(checkpoint, model, self._devices)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with tokenizing(self.tokenizer):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            prefixed = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if prefixed else self._add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        with tokenizing(self.tokenizer):
            return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request (_, context, continuation) of token ids, the log-probability of the continuation and
        whether greedy decoding would produce it.

        Raises:
            BarberError: a continuation is longer than `max_length`.
        """
        # Requests with the same input share a forward pass, such as the one-token continuations yes and no.
        inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) > self.max_length:
                raise BarberError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length {self.max_length}"
                )
            inputs.setdefault(tuple(kept[:-1]), []).append(number)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        for ids, batch in self._batches(list(inputs), "log-likelihoods", disable_tqdm):
            # One entry per token to score; `owners` holds the number of its request.
            rows, positions, targets, owners = [], [], [], []
            for row, tokens in enumerate(batch):
                for number in inputs[tokens]:
                    continuation = requests[number][2]
                    first = len(tokens) - len(continuation)
                    rows += [row] * len(continuation)
                    positions += range(first, len(tokens))
                    targets += continuation
                    owners += [number] * len(continuation)
            log_probabilities, greedy = self._model.log_likelihoods(ids, *map(np.array, (rows, positions, targets)))
            owners = np.array(owners)
            for number in np.unique(owners):
                own = owners == number
                answer = float(log_probabilities[own].sum(dtype=np.float64)), bool(greedy[own].all())
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, computed in disjoint windows of `max_length` tokens."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (log_probability, _) in zip(owners, answers, strict=True):
            totals[number] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a greedy continuation of each context, cut at its first stop sequence.

        Raises:
            BarberError: a task requests sampling, or leaves no positions for the context.
        """
        # Requests with the same stop sequences and the same token limit can share a batch.
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]), DEFAULT_NEW_TOKENS)
            if options.get("do_sample"):
                raise BarberError("the task samples; only greedy generation is supported (do_sample=False)")
            until = handle_stop_sequences(
                list(options.get("until") or []), eos=self.tokenizer.decode(self.eot_token_id)
            )
            groups.setdefault((options["max_gen_toks"], tuple(filter(None, until))), []).append(number)
        continuations: list[str] = [""] * len(requests)
        for (new_tokens, until), numbers in groups.items():
            if new_tokens >= self.max_length:
                raise BarberError(
                    f"max_gen_toks {new_tokens} leaves no room for a context in {self.max_length} positions; lower it"
                )
            contexts: dict[tuple[int, ...], list[int]] = {}
            for number in numbers:
                tokens = self.tok_encode(requests[number].args[0])[-(self.max_length - new_tokens) :]
                contexts.setdefault(tuple(tokens or [self.prefix_token_id]), []).append(number)
            for ids, batch in self._batches(list(contexts), "generations", disable_tqdm, new_tokens):
                for tokens, text in zip(batch, self._generate(ids, batch, new_tokens, until), strict=True):
                    for number in contexts[tokens]:
                        continuations[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return continuations

    def _generate(
        self, ids: np.ndarray, batch: list[tuple[int, ...]], new_tokens: int, until: tuple[str, ...]
    ) -> list[str]:
        """Greedy continuations of a batch from `_batches`, each cut at its first stop sequence.

        Args:
            ids: int32 [B, L], the contexts padded on the right.
            batch: the contexts; fewer than B where rows are padding.
            new_tokens: limit of generated tokens.
            until: stop sequences.
        """
        lengths = np.ones(len(ids), np.int32)
        lengths[: len(batch)] = [len(tokens) for tokens in batch]

        def decode(tokens: np.ndarray) -> Iterator[tuple[str, bool]]:
            """(text, whether it is finished) of each row of generated tokens, int32 [B, n]."""
            for row in tokens[: len(batch), :new_tokens]:
                ends = np.flatnonzero(np.isin(row, self._end_tokens))
                text = self.tokenizer.decode(row[: ends[0] + 1] if len(ends) else row, skip_special_tokens=True)
                yield text, len(ends) > 0 or any(term in text for term in until)

        def stop(tokens: np.ndarray) -> bool:
            return all(finished for _, finished in decode(tokens))

        tokens = self._model.generate(ids, lengths, new_tokens, STOP_CHECK_INTERVAL, stop)
        return [postprocess_generated_text(text, list(until), None) for text, _ in decode(tokens)]

    def _batches(
        self, sequences: list[tuple[int, ...]], what: str, quiet: bool, new_tokens: int = 0
    ) -> Iterable[tuple[np.ndarray, list[tuple[int, ...]]]]:
        """Group sequences of token ids into batches, longest first, and show progress.

        Args:
            what: label of the progress bar.
            quiet: hide the progress bar.
            new_tokens: tokens to be generated after each sequence, which count towards the batch's tokens.

        Yields:
            ids int32 [B, L], padded on the right with zeros, and the at most B sequences that they hold.
        """
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for tokens in sequences:
            by_length.setdefault(padded_length(len(tokens), self.max_length), []).append(tokens)
        data = self._devices.shape[0]
        batch_tokens = CPU_BATCH_TOKENS if self._devices.used[0].platform == "cpu" else DEVICE_BATCH_TOKENS
        console = plain_console(sys.stderr, quiet=quiet)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=len(sequences))
            for length in sorted(by_length, reverse=True):
                alike = by_length[length]
                rows = self._batch_size or max(1, batch_tokens // (length + new_tokens))
                # Where there are fewer sequences, a power of two limits the number of shapes to compile.
                rows = min(rows, 1 << (len(alike) - 1).bit_length())
                rows = -(-rows // data) * data
                for begin in range(0, len(alike), rows):
                    batch = alike[begin : begin + rows]
                    ids = np.zeros((rows, length), np.int32)
                    for row, tokens in enumerate(batch):
                        ids[row, : len(tokens)] = tokens
                    yield ids, batch
                    progress.advance(task, len(batch))
