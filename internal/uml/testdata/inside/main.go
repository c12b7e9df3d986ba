// Command inside says whether it runs in a guest.
package main

import (
	"fmt"
	"os"

	"cleancut/internal/uml"
)

func main() { fmt.Printf("inside=%v uid=%d\n", uml.Inside(), os.Getuid()) }
