"""Train an LLM agent: ``python train.py experiment=quickstart``; options: configs/train.yaml."""

from aem_lightning.runner.commands import train

if __name__ == "__main__":
    train()
