namespace qat::models {}
