"""The Hugging Face Hub: whether it can be reached, asked once and quickly."""

_PROBE_SECONDS = 10


def probe() -> None:
    """Return if the Hub answers; raise at once what the client says if it does not.

    A download does not give up without a network before it has retried for half a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
