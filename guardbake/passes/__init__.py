"""Graph passes on onnx-ir: locate the sites, insert the guard or fold it, verify that it is there.

A pass touches the graph and adds kilobytes; the model's weights stay where they are, and a folded
one is computed when it is asked for. Passes neither load nor save files.
"""
