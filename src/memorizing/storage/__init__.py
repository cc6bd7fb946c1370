"""The one way anything is written, read back, checked and locked.

files      files that are whole or not there; JSON; what is left of writers that were killed
folders    folders that are whole or not there, with the checksums of their files
tensors    safetensors, in and out
locks      one writer at a time
"""
