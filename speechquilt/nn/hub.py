"""Model folders by name: `hub:openai/whisper-small` stands wherever a Hugging Face folder is asked for.

It is downloaded once into the cache of `huggingface_hub`, whose environment variables (HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE) hold.
Trap: pickled weights and code are left where they are; a checkpoint without safetensors arrives without weights.
"""

from functools import cache
from pathlib import Path

HUB = "hub:"
FILES = ("*.json", "*.safetensors", "*.txt", "LICENSE*")


def local_folder(name: str | Path) -> Path:
    """The folder of `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`, downloaded where it is not yet; any other path as it is.

    Raises OSError naming the remedy when it can neither be found nor reached.
    """
    if not str(name).startswith(HUB):
        return Path(name)
    return _downloaded(str(name))


@cache  # one revision in a process, asked for once
def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # a name that cannot be one is a ValueError
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{name} cannot be had from the hub ({reason}); check the name and the network, or give a folder that was "
            "downloaded elsewhere"
        ) from error
