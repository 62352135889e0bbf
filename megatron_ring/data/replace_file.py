"""Writing a small file so that a reader finds the old one or the whole new one, never half of it."""

from pathlib import Path


def replace_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` under a temporary name beside ``path``, then rename it over ``path``."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(path)
