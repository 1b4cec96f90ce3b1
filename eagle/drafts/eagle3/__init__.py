"""EAGLE-3 (arXiv 2503.01840): one layer that reads the inputs of several of the target's layers and drafts tokens.

family          the answers to everything `eagle.drafts.interface` asks
network         ``fc``, one decoder layer of double input width, a norm and a head over the likeliest tokens
draft_config    its config.json: which layers it reads, how many tokens it chooses among
vocabulary      which tokens these are
public          drafts as other trainers save them
objective       cross-entropy over them, step by step
memory          what it takes while it is trained
"""
