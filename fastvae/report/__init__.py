"""Measurements on a user's machine: speed, accuracy and the state of the installation.

machine         the machine and the versions
timing          seconds of a call, contestants in turns
correctness     the derived tolerance, checked before every time
contestants     models of a benchmark, or why one is missing
benchmark       `fastvae bench`
compare_stages  an autoencoder stage by stage
compare         `fastvae compare`: error of each stage
findings        one finding of the doctor: a severity and a sentence
torch_checks    checks of the doctor that need torch
doctor          `fastvae doctor`
tuning          `fastvae tune`: the fastest accurate form of each convolution
hardware_plan   `fastvae plan-hardware`: cores that a device needs for a user's pictures
number_format   figures for people
bar_chart       bars as SVG
page            a result as one HTML file
"""
