"""The image library: images are encoded once, and kept for all conversations and later processes."""

from .library import ImageLibrary, LibraryCounts, LibraryImage

__all__ = ["ImageLibrary", "LibraryCounts", "LibraryImage"]
