"""The Hugging Face hub, asked once and quickly: is this model there, and for this token?"""

from __future__ import annotations

import os

from ..errors import AssetError

SECONDS = 8.0  # for its answer


def ask(name: str) -> str:
    """Looks for a model by its configuration; downloads nothing.

    Args:
        name: ``organisation/name``.

    Returns:
        What was found, in a sentence.

    Raises:
        AssetError: It is not there, not for this token, or the hub is out of reach and the model
            not in the local cache.
    """
    import requests
    from huggingface_hub import constants, get_token, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    token = get_token()  # of the environment, or of `huggingface-cli login`
    named = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `huggingface-cli login`"
    page = f"{constants.ENDPOINT}/{name}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        # The hub's own call for this asks a dead hub for half a minute.
        answer = requests.head(
            hf_hub_url(name, "config.json"),
            headers=build_hf_headers(token=token or False),
            timeout=SECONDS,
        )
        hf_raise_for_status(answer)
        return f"{name} is on the hub, and {named if token else 'anyone'} may read it"
    except GatedRepoError:
        raise AssetError(
            f"the model {name} is gated, and "
            + (f"{named} is not allowed to read it" if token else "there is no HF_TOKEN"),
            where=page,
            expected="an account that accepted its licence, and a token of that account",
            do=f"accept the licence at {page}, make a token with permission to "
            "read, and `export HF_TOKEN=…` (or `huggingface-cli login`) before starting",
        ) from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise AssetError(
            f"the hub has no model {name}, or none that may be read with "
            + (named if token else "no token"),
            where=page,
            expected="organisation/name of a model, or a folder",
            do="correct model_name_or_path, or `export HF_TOKEN=…` where it is private",
        ) from None
    except (OSError, HfHubHTTPError) as error:
        if cached(name):
            return f"{name} is in the local cache; the hub was not asked"
        raise AssetError(
            f"the hub cannot be asked for the model {name}, and it is not in the local cache: "
            + (str(error).splitlines() or [type(error).__name__])[0][:160],
            where=page,
            expected="a hub that answers, or a folder as model_name_or_path",
            do="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder",
        ) from None


def cached(name: str) -> bool:
    """Whether a model's configuration is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
