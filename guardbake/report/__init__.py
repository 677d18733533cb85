"""Plots and reports for people. The only room that draws; matplotlib is the extra [report]."""
