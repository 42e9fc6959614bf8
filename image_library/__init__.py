"""The image library: images are computed once, and kept for all conversations and later processes."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .library import ImageLibrary, LibraryCounts, LibraryImage

__all__ = ["ImageLibrary", "LibraryCounts", "LibraryImage"]
# Imported on first use, as commands read their flags without torch.
__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "library"))
