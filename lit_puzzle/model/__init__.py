"""The gpt-oss models and what is done to their weights; importing it offers `sink_attention` to all of them."""

from lit_puzzle.model import sink_attention as sink_attention
