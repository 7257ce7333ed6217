"""lm-eval's model class over our decoder: registered as `barber_jax` as soon as this is imported.

Sequences are batched with others of about their length and padded to a few lengths, each a fixed number of tokens a
batch, so that a handful of programs is compiled. Scores are those of lm-eval's `hf` model: the same tokens, the same
truncation from the left, natural logarithms.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import Progress

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.devices.mesh import Devices
from barber_jax.devices.options import parse_mesh
from barber_jax.devices.settings import set_precision
from barber_jax.forward.resident import ResidentModel
from barber_jax.models import build_model

SHORTEST = 32
"""Sequences are padded to this many tokens at least."""
CPU_TOKENS, TOKENS = 2048, 16384
"""Tokens of a batch where the user gives no size: on CPU, and elsewhere."""
GENERATED, STEPS = 256, 16
"""Most tokens generated where a task does not say, as lm-eval has it; tokens between two looks for a stop."""


def bucket(length: int, longest: int) -> int:
    """The length that a sequence of `length` tokens is padded to: 32, 48, 64, 96, 128, ... up to `longest`."""
    size = SHORTEST
    while size < length:
        # Powers of two, and halfway between them.
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, longest))


@register_model("barber_jax")
class BarberLM(TemplateLM):
    """A checkpoint as lm-eval sees it.

    Args:
        pretrained: folder, Hub id or .gguf file.
        batch_size: sequences in a batch; None or "auto": as many as make about 2048 tokens on CPU, 16384 elsewhere.
        dtype: float32 or bfloat16, of activations and matrix products.
        mesh: `data=N,model=M`; None for one device.
        max_length: longest sequence; None for the model's positions.
        add_bos_token: whether encoding adds special tokens; None: as the tokenizer does.
        max_batch_size, device: not used; lm-eval passes them to every model. JAX chooses the device; JAX_PLATFORMS
            (cpu, cuda, tpu) tells it which.

    Raises:
        BarberError: the checkpoint cannot be used, or has no tokenizer.
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
        # The samples' side of the check always holds: batches are made to fit.
        self._devices.check(model.block(), self._devices.shape[0])
        self._name, self._add_bos_token = pretrained, add_bos_token
        # A chat model may end its turn with another token than the tokenizer's end of text.
        ends = checkpoint.config.get("eos_token_id")
        self._ends = [self.eot_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
        self.max_length = min(int(max_length or model.positions), model.positions)
        self._rows = None if batch_size in (None, "auto") else int(batch_size)
        self._model = ResidentModel(checkpoint, model, self._devices)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
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
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would give it) of each request."""
        # One-token continuations of the same context, as yes and no, share a forward.
        inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) > self.max_length:
                raise BarberError(f"a continuation of {len(continuation)} tokens is longer than {self.max_length}")
            inputs.setdefault(tuple(kept[:-1]), []).append(number)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        for ids, batch in self._batches(list(inputs), "log-likelihoods", disable_tqdm):
            rows, places, targets, owners = [], [], [], []
            for row, tokens in enumerate(batch):
                for number in inputs[tokens]:
                    continuation = requests[number][2]
                    first = len(tokens) - len(continuation)
                    rows += [row] * len(continuation)
                    places += range(first, len(tokens))
                    targets += continuation
                    owners += [number] * len(continuation)
            log, likeliest = self._model.judge(ids, np.array(rows), np.array(places), np.array(targets))
            owners = np.array(owners)
            for number in np.unique(owners):
                own = owners == number
                answer = float(log[own].sum(dtype=np.float64)), bool(likeliest[own].all())
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, cut into windows of the longest sequence."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each context, up to its stop sequences.

        Raises:
            BarberError: a task asks for sampling, or for more tokens than fit.
        """
        # Requests that stop at the same and have the same room go together.
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]), GENERATED)
            if options.get("do_sample"):
                raise BarberError("the task samples; only greedy generation is supported (do_sample=False)")
            until = handle_stop_sequences(
                list(options.get("until") or []), eos=self.tokenizer.decode(self.eot_token_id)
            )
            groups.setdefault((options["max_gen_toks"], tuple(filter(None, until))), []).append(number)
        made: list[str] = [""] * len(requests)
        for (most, until), numbers in groups.items():
            if most >= self.max_length:
                raise BarberError(f"max_gen_toks {most} leaves no room for a context in {self.max_length} positions")
            contexts: dict[tuple[int, ...], list[int]] = {}
            for number in numbers:
                tokens = self.tok_encode(requests[number].args[0])[-(self.max_length - most) :]
                contexts.setdefault(tuple(tokens or [self.prefix_token_id]), []).append(number)
            for ids, batch in self._batches(list(contexts), "generations", disable_tqdm, most):
                for tokens, text in zip(batch, self._generate(ids, batch, most, until), strict=True):
                    for number in contexts[tokens]:
                        made[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return made

    def _generate(self, ids: np.ndarray, batch: list[tuple[int, ...]], most: int, until: tuple[str, ...]) -> list[str]:
        """Texts that continue the contexts of a batch, each cut at its first stop sequence."""
        lengths = np.ones(len(ids), np.int32)
        lengths[: len(batch)] = [len(tokens) for tokens in batch]

        def texts(tokens: np.ndarray) -> Iterator[tuple[str, bool]]:
            """Each text so far, and whether it is finished."""
            for row in tokens[: len(batch), :most]:
                ends = np.flatnonzero(np.isin(row, self._ends))
                text = self.tokenizer.decode(row[: ends[0] + 1] if len(ends) else row, skip_special_tokens=True)
                yield text, len(ends) > 0 or any(term in text for term in until)

        def stop(tokens: np.ndarray) -> bool:
            return all(finished for _, finished in texts(tokens))

        tokens = self._model.generate(ids, lengths, -(-most // STEPS) * STEPS, STEPS, stop)
        return [postprocess_generated_text(text, list(until), None) for text, _ in texts(tokens)]

    def _batches(
        self, sequences: list[tuple[int, ...]], what: str, quiet: bool, more: int = 0
    ) -> Iterable[tuple[np.ndarray, list[tuple[int, ...]]]]:
        """(ids int32 [B, L] padded on the right, the sequences they hold), longest first. `more` tokens are to be
        added to each, which its batch must leave room for."""
        by_size: dict[int, list[tuple[int, ...]]] = {}
        for tokens in sequences:
            by_size.setdefault(bucket(len(tokens), self.max_length), []).append(tokens)
        data = self._devices.shape[0]
        most = CPU_TOKENS if self._devices.used[0].platform == "cpu" else TOKENS
        console = Console(stderr=True, quiet=quiet)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=len(sequences))
            for size in sorted(by_size, reverse=True):
                own = by_size[size]
                rows = self._rows or max(1, most // (size + more))
                # A power of two, so that few short batches make few programs; a multiple of `data`.
                rows = min(rows, 1 << (len(own) - 1).bit_length())
                rows = -(-rows // data) * data
                for begin in range(0, len(own), rows):
                    batch = own[begin : begin + rows]
                    ids = np.zeros((rows, size), np.int32)
                    for row, tokens in enumerate(batch):
                        ids[row, : len(tokens)] = tokens
                    yield ids, batch
                    progress.advance(task, len(batch))
