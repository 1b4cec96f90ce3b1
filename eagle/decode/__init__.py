"""Speculative decoding: draft tokens with the head, verify them with the target in one pass, keep what it agrees with.

evaluate            the command line of ``python -m eagle.evaluate``
target              the target as decoding uses it; cache: its key-value cache, and the draft's
fitting_draft       a saved draft, loaded and checked to fit the target
tree                which drafted token hangs on which: a chain is a tree one node wide
drafter             what is drafted: a chain or a fixed tree, or EAGLE-2's dynamic tree
sampling            logits to a distribution, and draws from it
acceptance_rule     what the target chooses after a node
tree_verification   how far the draft went the way the target chose
generate            the loop
replies             prompts answered with the draft and without it
acceptance_counts   what the steps say about a draft
recommendation      what a step costs by the number of drafted tokens, and which number is fastest
serving_choice      acceptance weighed against what a step costs (step_costs); serving_lines: for people
report, picture     what `evaluate` tells about it
"""
