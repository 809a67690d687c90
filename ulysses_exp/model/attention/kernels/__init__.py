"""How attention over whole sequences is computed: one file a kernel, none of which makes a mask of n x n."""
