"""LAVIS (https://github.com/salesforce/LAVIS): the giant of EVA-CLIP, flat in `eva_vit_g.pth`, inside BLIP-2 models.

`lavis/models/eva_vit.py` reads the flat file by torch.load with strict=False into a pre-norm tower of 39 blocks without
final norm and head: block 39, `norm` and `head` of the file are passed over, and anything that is missing would stay
random without a word. So everything is written, in torch's own format.
"""

FILE = "eva_vit_g.pth"
