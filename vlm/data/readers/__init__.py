"""Readers of annotation formats, one file for each family of formats; `vlm.data.formats` is their table."""
