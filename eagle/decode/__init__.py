"""Speculative decoding: draft tokens with the head, verify them with the target in one pass, keep what it agrees with.

pair        the target and a draft that fits it
tree        which drafted token hangs on which: a chain is a tree one node wide
drafter     the draft's proposals: a chain or a fixed tree, or EAGLE-2's dynamic tree
sampling    logits to a distribution, and draws from it
accept      what the target chooses behind every node, and how far the draft went the same way
generate    the loop
statistics, costs, report, picture      what `eagle.evaluate` tells about it
"""
