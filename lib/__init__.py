"""What the scripts and model.py, dataloader.py, generate.py and int8.py stand on."""
