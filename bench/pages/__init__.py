"""Tables and pictures of results, written into README and docs.

merge_parts       the parts of bench/device.sh as one results file
tables            tables and pictures, from the results
bar_svg           bars as SVG
import_graph      imports as a graph, and the order that they must keep
architecture_svg  the picture of docs/architecture.md
"""
