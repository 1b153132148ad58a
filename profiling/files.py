"""Writing a file that others may read meanwhile."""

import tempfile
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a file whole: readers see the old one or the new one, never a part, and what fails or is broken off leaves
    nothing behind. What is no regular file (/dev/null, a link) is not replaced but written to.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_text(text)
        unfinished.replace(path)
