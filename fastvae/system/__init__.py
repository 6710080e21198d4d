"""Arguments, files, JSON, devices, threads and the terminal, independent of images and latents.

arguments           checks of users' numbers and choices
atomic_files        files written under a temporary name, then renamed; free space
safetensors_header  maximum length of a safetensors header
cache_folder        the folder of files kept for a user
strict_json         JSON without NaN and infinity
terminal            writing to stderr; sizes as text
devices             devices, their memory and default dtype
threads             ordered map and background writes
child_processes     functions called in another process, whose end is an error
"""
