"""EAGLE-1 (arXiv 2401.15077): one layer that extrapolates the target's last hidden state.

family              the answers to everything `eagle.drafts.interface` asks
network             ``fc`` and one decoder layer without its input norm
draft_config        its config.json
objective           SmoothL1 between features, cross-entropy between what they say
closed_form_start   the best linear draft
memory              what it takes while it is trained
vllm_layouts        the two folders vLLM loads it from
"""
