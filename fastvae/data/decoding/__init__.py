"""Stored latents back to images.

decode         `fastvae decode`: rows to PNG files
contact_sheet  originals beside reconstructions in one picture
demo           `fastvae demo`: photographs to latents and back
"""
