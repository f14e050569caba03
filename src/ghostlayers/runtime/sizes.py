"""Sizes of memory and files, as people write and read them."""

from ghostlayers.errors import RecipeError


def parse_memory(text: str | None) -> int | None:
    """A size such as 4GiB or 500MB in bytes; lower case means the same.

    Raises:
        RecipeError: it is none.
    """
    if text is None:
        return None
    from accelerate.utils import convert_file_size_to_int

    try:
        # Upper case: a small b would be bits.
        size = int(convert_file_size_to_int(text.replace(" ", "").upper()))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise RecipeError(f"'{text[:60]}' is no size; expected one such as 4GiB or 500MB.")
    return size


def show_bytes(size: float) -> str:
    """Bytes as people read them: 212.3 MiB, 15.02 GiB from a gibibyte on, 8.0 KiB below one MiB."""
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if abs(size) >= 2**20 else f"{size / 2**10:.1f} KiB"
