"""Graph passes on onnx-ir: locate the sites, insert the guard, verify that nothing goes round it.

A pass touches the graph and adds kilobytes; the model's weights stay where they are. Passes neither
load nor save files.
"""
