"""Files, devices, threads and the terminal: nothing here knows of images or latents.

arguments           checks of numbers and choices that users give
atomic_files        files that appear whole or not at all; free space
safetensors_header  the limit of a safetensors header
strict_json         JSON without NaN and infinity
terminal            writing to stderr, and sizes for people
devices             devices, their memory, and the dtype for each
threads             an ordered map and a writer in threads
"""
