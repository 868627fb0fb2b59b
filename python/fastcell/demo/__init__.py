"""``fastcell demo``: a character language model, trained with torch.nn and with fastcell at once.

``text`` reads, ``model`` and ``train`` do what any language-model script does, ``agreement`` says
whether both libraries computed the same, ``sample`` writes, ``checkpoint`` keeps, ``report`` and
``plot`` show, ``options`` and ``command`` are the command line.
"""
