"""Experts as files, put back, elsewhere, or left out.

request   what the command line asks for          experts   a layer's experts -> tensors and cards
card      what a card says, written and checked   runs      cards -> a run with changed weights
rows      which tensors hold an expert's rows     prune     a smaller model
loads     how much each expert served
"""
