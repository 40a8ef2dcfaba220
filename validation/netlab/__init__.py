"""The network lab: hosts emulated by Linux namespaces, real TCP and gloo between them, judged against moesim.

``python -m validation.netlab`` from the root of a checkout, as root; README.md says what it does.
"""
