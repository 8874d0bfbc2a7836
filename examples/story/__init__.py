"""The parts of examples/finetune.py: `engines` holds the lines that differ between plain PyTorch and
finefuse, `stages` the methods, `model` and `data` what they work on, `report` the table and the figure."""
