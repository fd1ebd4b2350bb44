"""What a frozen base weight is: dense, or quantised as NF4, int8 or fp8. kinds.py lists them; frozen.py is
what a layer holds; product.py multiplies by it; bnb.py converts from and to bitsandbytes.
"""
