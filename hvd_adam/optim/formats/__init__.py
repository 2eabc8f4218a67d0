"""Formats that hold an optimizer's state in fewer bits: exact definitions, slow and obvious."""
