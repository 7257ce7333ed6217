"""Checks quickly whether the Hugging Face Hub can be reached."""

_PROBE_SECONDS = 10


def probe() -> None:
    """Send one request to the Hub; raise the client's exception if it does not answer.

    Without a network, a download would fail only after retrying for half a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
