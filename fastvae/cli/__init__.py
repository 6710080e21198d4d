"""The command line: click commands, one file a verb. Nothing here imports torch before a command runs.

main     the group of commands, each loaded when it is called
options  options that several verbs share
output   errors as one sentence with an exit code, and results on stdout
signals  SIGTERM, SIGHUP and Ctrl-C
demo     photographs to latents and back
encode   images to a store
info     facts of a store or a model
verify   checks of a store
repair   damaged units encoded again
decode   rows to images
export   rows to other trainers' layouts
compare  error of each stage of a model
bench    speed beside other implementations
tune     the fastest form of each convolution on this device
plan_hardware  cores that a GPU needs for a user's pictures
doctor   what is in order on this machine
"""
