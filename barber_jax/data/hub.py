"""Checks quickly whether the Hugging Face Hub can be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

_PROBE_SECONDS = 10


def probe() -> None:
    """Send one request to the Hub; raise the client's exception if it does not answer.

    Without a network, a download would fail only after retrying for half a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """If the Hub does not answer, its libraries read their caches alone in the context: they do not retry, and say at
    once what is missing."""
    import datasets
    from huggingface_hub import constants

    try:
        probe()
    except Exception:
        places = (constants, datasets.config)
        before = [place.HF_HUB_OFFLINE for place in places]
        for place in places:
            place.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.HF_HUB_OFFLINE = value
    else:
        yield
