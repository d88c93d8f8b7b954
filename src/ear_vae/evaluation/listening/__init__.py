"""The listening report: excerpts of originals and systems on one page."""
