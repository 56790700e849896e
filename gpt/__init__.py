"""Train your own GPT/LLaMA-style language model from your own text: the rooms that train.py and sample.py stand on."""
