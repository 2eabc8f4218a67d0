"""Folders of images, with one folder per class: read from the files, or from a packed cache of them."""
