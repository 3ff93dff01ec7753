"""The score: what translations look like beside real pictures, whatever the losses say."""
