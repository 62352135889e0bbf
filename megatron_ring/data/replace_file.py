"""Writing a small file so that a reader finds the old one or the whole new one, never half of it."""

from pathlib import Path

from megatron_ring import untrusted


def replace_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` under a temporary name beside ``path``, then rename it over ``path``.

    Nothing is written through a link of either name.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with untrusted.create(temporary) as file:
        file.write(content)
    temporary.replace(path)
