"""Device code and launch helpers that every op may use.

runtime     where kernels run, and the Cost of a call
tiles       the tile of a kernel, from the tables in tuned/
statistics  partial statistics, and merging them
philox      counter-based random numbers
"""
