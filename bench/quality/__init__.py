"""The accuracy study: five ways of fine-tuning on real texts, over several seeds: python -m bench quality"""
